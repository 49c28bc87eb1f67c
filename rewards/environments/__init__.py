"""Tools and environments that come with Troupe. What each is called in a recipe: `rewards.shipped_environments`."""
