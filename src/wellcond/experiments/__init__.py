"""Image experiments: data, models, recipes, training, results: what the command line runs."""
