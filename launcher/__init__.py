"""Everything a person types: the command line, recipes, reports. It composes and holds no algorithm."""
