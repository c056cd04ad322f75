"""The verb `kvbm verify`: reads every object of a durable or remote tier, and proves its bytes."""
