"""The verb `kvbm clear`: deletes objects by namespace, age or size, where no engine is."""
