"""The yardstick of quality behind `quire eval`: held-out examples, asked through the engine itself.

questions.py draws them, prompts.py renders them as the model's chat template wants, answers.py runs
them, intervals.py says how sure the figures are, report.py shows them, compare.py holds them
against an earlier run, draft.py measures how well a small model guesses a large one's answers.
"""
