"""A reward as a class, built once with its settings."""


class Brevity:
    def __init__(self, limit):
        self.limit = limit

    def __call__(self, completions, **columns):
        return [1.0 if len(completion[0]["content"]) <= self.limit else 0.0 for completion in completions]
