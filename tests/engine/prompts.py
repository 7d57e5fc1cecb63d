"""32 prompts of various kinds and lengths for the demo model."""

_OPENINGS = [
    "The capital of France is",
    "Once upon a time, in a village at the foot of a mountain,",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\n",
    "The three laws of thermodynamics say that",
    "Q: Why is the sky blue?\nA:",
    "Ingredients: flour, sugar, butter.\nSteps:\n1.",
    "In 1969, two people",
    "SELECT name FROM users WHERE",
    "La capitale de l'Italie est",
    "The main difference between a list and a tuple in Python is",
    "<html>\n<head>\n<title>",
    "Roses are red,",
    "Breaking news:",
]
_CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "Name five animals that live in the forest.",
    "How do I boil an egg?",
    "What is 12 times 12?",
    "Give me a synonym for happy.",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' to Spanish.",
    "What are the primary colors?",
    "Tell me a fact about the moon.",
    "Summarize the story of Cinderella in one sentence.",
]
_LONG = "The history of computing begins with counting. " * 12
_TABLE = "\n".join(f"{i} squared is {i * i}." for i in range(1, 25))

PROMPTS = [
    *_OPENINGS,
    *(_CHAT.format(question) for question in _QUESTIONS),
    _LONG,
    _LONG + "In the end,",
    _TABLE + "\n25 squared is",
    "😀 ünïcödé 漢字 and more:",
]
assert len(PROMPTS) == 32
