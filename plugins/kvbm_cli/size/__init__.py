"""The verb `kvbm size`: bytes of a block and tokens that fit, from a model's config.json alone."""
