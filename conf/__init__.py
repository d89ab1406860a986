"""What may be chosen: one typed settings class per stage, and the recipes."""
