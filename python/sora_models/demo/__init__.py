"""The demo behind ``sora demo``: :mod:`sora_models.demo.run` is its entrance."""
