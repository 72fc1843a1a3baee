import pytest

from guard import taxonomy


def test_there_are_fourteen_categories_in_order() -> None:
    assert list(taxonomy.CATEGORIES) == [f"S{i}" for i in range(1, 15)]


def test_every_mapping_points_at_known_codes() -> None:
    codes = set(taxonomy.CATEGORIES)
    single = (taxonomy.OPENAI_MODERATION, taxonomy.DIASAFETY)
    for table in (*single, taxonomy.AILUMINATE, taxonomy.SIMPLE_SAFETY_TESTS):
        assert set(table.values()) <= codes
    for alternatives in taxonomy.OPENAI_KEYS.values():
        for alternative in alternatives:
            assert set(alternative) <= codes


def test_openai_keys_are_those_of_the_official_client() -> None:
    categories = pytest.importorskip("openai.types.moderation").CategoryScores
    keys = {field.alias or name for name, field in categories.model_fields.items()}
    assert set(taxonomy.OPENAI_KEYS) == keys


def test_a_threat_needs_both_of_its_codes() -> None:
    hate_only = taxonomy.openai_scores({"S10": 0.8})
    assert hate_only["hate"] == 0.8 and hate_only["hate/threatening"] == 0.0
    both = taxonomy.openai_scores({"S10": 0.8, "S1": 0.3})
    assert both["hate/threatening"] == 0.3


def test_a_key_without_a_code_is_never_raised() -> None:
    everything = dict.fromkeys(taxonomy.CATEGORIES, 1.0)
    scores = taxonomy.openai_scores(everything)
    assert [key for key, score in scores.items() if score == 0] == ["violence/graphic"]
