"""Faster ways to the same mathematics; each is tested against PEFT and transformers, and can be switched off."""
