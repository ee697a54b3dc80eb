from .stack import gru, lstm, rnn

__all__ = ["gru", "lstm", "rnn"]
