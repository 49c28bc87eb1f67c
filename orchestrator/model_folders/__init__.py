"""Model folders between runs: found in a run or checkpoint, exported, merged."""
