"""LoRA training over a frozen base model."""
