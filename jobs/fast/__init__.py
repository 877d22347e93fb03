"""Faster ways to what PEFT and transformers compute; each is tested against them."""
