"""LNGD within Hugging Face's Trainer: arguments, trainers, the stock Trainer's flag, model cards, translation."""
