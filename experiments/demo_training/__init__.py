"""Parts of scripts/train_demo_model.py: the recipe, the text as training sequences, the report on unseen texts."""
