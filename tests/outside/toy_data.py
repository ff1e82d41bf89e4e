"""A data set: differences of two numbers."""

from grpo.data.problems import Problem, Problems


def load(**settings):
    pairs = [(a, b) for a in range(20, 40) for b in range(1, 20, 3)]
    problems = [Problem(f"{a}-{b}", f"What is {a} - {b}?", str(a - b)) for a, b in pairs]
    return Problems(problems[10:], problems[:10])
