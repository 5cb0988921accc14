from cl_dist.data.bayes import NaiveBayes

ROWS = [("a fine good film", "good"), ("good, very good", "good"), ("a bad film", "bad"), ("dull and bad", "bad")]


def test_the_words_of_a_label_decide() -> None:
    judge = NaiveBayes(ROWS)
    assert judge.answer("GOOD!") == "good"
    assert judge.answer("so dull") == "bad"
    assert judge.answer("never seen") == "bad"  # nothing known: equally likely, the first by name
    assert judge.agreement(ROWS) == 1.0
    assert judge.agreement([(text, "good") for text, _ in ROWS]) == 0.5
    assert judge.agreement([]) is None


def test_smoothing_is_that_of_the_formula() -> None:
    """Of "film": (1 + 1) / (7 + 8) in good, (1 + 1) / (6 + 8) in bad, so bad; "a" alike, "fine" turns it."""
    judge = NaiveBayes(ROWS)
    assert judge.answer("film") == "bad"
    assert judge.answer("film fine") == "good"
