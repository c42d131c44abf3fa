"""What `surf.finetune` is made of: the model, its loss, the order of the samples, the Trainer, its processes."""
