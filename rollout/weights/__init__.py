"""How weights travel from the trainer to the engines. A version counts only where it was acknowledged."""
