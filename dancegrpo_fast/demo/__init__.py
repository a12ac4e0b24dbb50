"""Small generators, data and prompts that train offline in minutes on two CPU cores."""
