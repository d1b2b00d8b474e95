"""Fine-tune one adapter on a frozen backbone that the caller provides."""
