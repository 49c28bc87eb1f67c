"""From rewards to what each token is credited with: advantages, returns, rewards of single steps. Pure mathematics."""
