"""From a configuration to what is launched: pipelines and data opened, roles sized, processes placed on paper."""
