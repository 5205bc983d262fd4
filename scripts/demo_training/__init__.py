"""The parts of `train_demo_model.py`: corpus, tokenizer, model, batches, checkpoint, loop, report."""
