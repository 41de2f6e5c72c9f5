"""From a checkpoint to a cheaper one: recipes, the pipeline that runs them, and the shortcuts."""
