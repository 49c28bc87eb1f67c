"""From a configuration to a plan: pipelines and data opened, roles sized, processes assigned to bundles."""
