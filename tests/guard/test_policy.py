import threading
import time
from pathlib import Path

import pytest

from core_llm.errors import UserError
from guard.cli import main
from guard.guard import Guard
from guard.policy import Category, Policy, PolicyStore
from guard.prompter import Prompter
from guard.testing import tiny_guard
from guard.verdict import Reading

FILE = """
name: my house
version: "2026-11"
threshold: 0.4
window: 128
categories:
  - code: S1
  - {code: S10, threshold: 0.2}
  - {code: pets, name: Pets, description: Cats and dogs., hazard: S2}
  - {code: S3, enabled: false}
"""


def saved(folder: Path, text: str) -> Path:
    path = folder / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_says_everything(tmp_path: Path) -> None:
    policy = Policy.read(saved(tmp_path, FILE))
    assert (policy.name, policy.version, policy.threshold) == ("my house", "2026-11", 0.4)
    assert (policy.window, policy.context) == (128, 256)
    assert [c.code for c in policy.enabled] == ["S1", "S10", "pets"]
    assert policy.categories["S1"].name == "Violent Crimes" and policy.categories["S10"].threshold == 0.2
    assert policy.categories["pets"] == Category("pets", "Pets", "Cats and dogs.", hazard="S2")
    assert policy.hazards({"pets": 0.3, "S1": 0.5}) == {"S2": 0.3, "S1": 0.5}


@pytest.mark.parametrize(("written", "read"), [("2", "2"), ("1.5", "1.5"), ("2026-11-21", "2026-11-21")])
def test_a_version_need_not_be_quoted(tmp_path: Path, written: str, read: str) -> None:
    policy = Policy.read(saved(tmp_path, f"version: {written}\ncategories: [{{code: S1}}]"))
    assert policy.version == read
    policy.write(tmp_path / "again.yaml")
    assert Policy.read(tmp_path / "again.yaml").version == read


def test_written_and_read_again_it_is_the_same(tmp_path: Path) -> None:
    policy = Policy.read(saved(tmp_path, FILE))
    policy.write(tmp_path / "again.yaml")
    again = Policy.read(tmp_path / "again.yaml")
    assert again == policy and again.digest == policy.digest and hash(again) == hash(policy)
    assert not list(tmp_path.glob("*.tmp"))
    assert Policy().digest != policy.digest


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("categories: []", "categories: "),
        ("categories: [{code: S1}]\nmode: fast", "mode: unknown key; allowed are name, version"),
        ("categories: [{code: S1, treshold: 0.5}]", "categories.0.treshold: unknown key; allowed are code"),
        ("categories: [{code: S1, threshold: 1.5}]", "categories.0.threshold: .*less than 1"),
        ("categories: [{code: S1, threshold: .nan}]", "categories.0.threshold"),
        ("categories: [{code: S1, threshold: '0.5'}]", "categories.0.threshold"),
        ("categories: [{code: S1, enabled: 1}]", "categories.0.enabled"),
        ("categories: [{code: S99}]", "needs a name"),
        ("categories: [{code: 'S 1', name: x}]", "categories.0.code"),
        ('categories: [{code: S1, name: "two\\nlines"}]', "categories.0.name"),
        ("categories: [{code: S1, hazard: S77}]", "hazard S77 is none of S1"),
        ("categories: [{code: S1}, {code: S1}]", "S1 is there twice"),
        ("categories: [{code: S1, enabled: false}]", "no categories that are on"),
        ("categories: [{code: S1}]\ncategories: [{code: S2}]", "line 2.*'categories' is there twice"),
        ("a: &x [1]\nb: *x", "line 2.*aliases"),
        ("categories: {S1: x}", "categories: "),
        ("- S1", "a policy is a mapping"),
        ("{", "not valid YAML"),
        ("!!python/object/apply:os.system [true]", "not valid YAML"),
        ("", "a policy is a mapping"),
        ("window: 4\ncategories: [{code: S1}]", "window: .*8"),
        ("x: " + "[" * 5000, "not valid YAML"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_key(tmp_path: Path, text: str, told: str) -> None:
    path = saved(tmp_path, text)
    with pytest.raises(UserError, match=told) as raised:
        Policy.read(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_other_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not readable"):
        Policy.read(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        Policy.read(tmp_path / "bytes.yaml")
    (tmp_path / "long.yaml").write_text("#" * 1_000_001)
    with pytest.raises(UserError, match="longer than"):
        Policy.read(tmp_path / "long.yaml")


def test_a_reload_replaces_it_whole_or_not_at_all(tmp_path: Path) -> None:
    path = saved(tmp_path, FILE)
    store = PolicyStore(path)
    first = store.current
    saved(tmp_path, FILE.replace("0.4", "4"))
    with pytest.raises(UserError, match="threshold"):
        store.reload()
    assert store.current is first
    path.unlink()
    with pytest.raises(UserError, match="not readable"):
        store.reload()
    assert store.current is first
    saved(tmp_path, FILE.replace("0.4", "0.6"))
    assert store.reload().threshold == 0.6 and store.current.threshold == 0.6


def test_a_policy_that_the_guard_cannot_follow_is_not_taken(tmp_path: Path) -> None:
    guard = tiny_guard()
    path = saved(tmp_path, "categories: [{code: S1}]")
    store = PolicyStore(path, check=guard.prompter.reading)
    saved(tmp_path, "categories: [{code: pets, name: Pets}]")
    with pytest.raises(UserError, match="reads no rules"):
        store.reload()
    assert "S1" in store.current.categories


def test_a_watched_file_is_reloaded_and_a_bad_one_told_once(tmp_path: Path) -> None:
    path = saved(tmp_path, FILE)
    store = PolicyStore(path)
    changed, failed = threading.Event(), []
    store.watch(0.01, lambda _: changed.set(), failed.append)
    try:
        saved(tmp_path, "categories: nonsense")
        deadline = time.monotonic() + 5
        while not failed and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(failed) == 1 and store.current.threshold == 0.4
        saved(tmp_path, FILE.replace("0.4", "0.7"))
        assert changed.wait(5) and store.current.threshold == 0.7
    finally:
        store.close()


def reading(policy: Policy, guard: Guard) -> Reading:
    return guard.prompter.reading(policy)


def test_thresholds_per_category_decide_for_theirs_alone() -> None:
    guard = tiny_guard(brief=False)
    policy = Policy(
        [Category("S1", "A"), Category("S2", "B", threshold=0.8), Category("S3", "C", threshold=0.1)]
    )
    judge = reading(policy, guard).verdict
    only_b = judge(0.7, 0.99, [0.02, 0.96, 0.02])  # S2 0.67 is below its own threshold, S1 0.014 below 0.5
    assert not only_b.unsafe and only_b.named == []
    assert judge(0.9, 0.99, [0.02, 0.96, 0.02]).named == ["S2"]
    assert judge(0.3, 0.99, [0.3, 0.2, 0.5]).named == ["S3"]
    assert judge(0.9, 0.99, [0.9, 0.05, 0.05]).named == ["S1"]
    assert judge(0.01, 0.3, [0.4, 0.3, 0.3]).unsafe  # no verdict at all
    nothing = judge(float("nan"), 0.99, [0.4, 0.3, 0.3])
    assert nothing.unsafe and nothing.probability == 1.0


def test_a_category_that_is_off_lets_pass_what_falls_under_it() -> None:
    guard = tiny_guard()  # reads no rules: it tells all its categories, whatever the policy says
    judge = reading(Policy([Category("S1", "A"), Category("S2", "B", enabled=False)]), guard).verdict
    shares = [0.1, 0.9] + [0.0] * 12
    verdict = judge(0.9, 0.99, shares)
    assert not verdict.unsafe and verdict.probability == pytest.approx(0.09)
    assert verdict.categories == {"S1": pytest.approx(0.09)}
    assert judge(0.9, 0.3, shares).unsafe


def test_a_guard_that_reads_no_rules_takes_other_names_for_what_it_knows() -> None:
    guard = tiny_guard()
    policy = Policy([Category("violence", "Violence", hazard="S1"), Category("S10", "Hate")])
    columns = reading(policy, guard).columns
    assert columns[0] == "violence" and columns[9] == "S10" and columns[1] is None
    twice = Policy([Category("violence", "Violence", hazard="S1"), Category("S1", "Violent Crimes")])
    with pytest.raises(UserError, match="one and the same"):
        reading(twice, guard)


def test_custom_categories_reach_the_prompt_of_a_guard_that_reads_rules() -> None:
    from core_llm.chat import Message

    guard = tiny_guard(brief=False)
    policy = Policy([Category("S2", "Fraud"), Category("pets", "Pets", "Cats and dogs.")])
    [row] = guard.prompter.rows([Message("user", "x")], reading(policy, guard))
    text = guard.tokenizer.decode(row.ids)
    assert "S2: Fraud.\nS1: Pets. Cats and dogs." in text and "Hate" not in text
    assert list(guard.classify([[Message("user", "x")]], policy=policy)[0].categories) == ["S2", "pets"]


def test_a_temperature_moves_the_probability_and_not_the_mass() -> None:
    from core_llm.chat import Message

    guard = tiny_guard()
    before = guard.classify([[Message("user", "hello")]])[0]
    guard.temperature = 2.0
    after = guard.classify([[Message("user", "hello")]])[0]
    odds = (before.probability / (1 - before.probability)) ** 0.5
    assert after.probability == pytest.approx(odds / (1 + odds), abs=1e-9) and after.mass == before.mass
    assert guard.prompter.settings()["temperature"] == 2.0
    with pytest.raises(UserError, match="temperature"):
        guard.temperature = 0.0


def test_the_command_line_shows_and_checks_policies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["guard", "policy", *arguments])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    assert run("show") == 0
    assert Policy.read(saved(tmp_path, capsys.readouterr().out)) == Policy()
    path = saved(tmp_path, FILE)
    assert run("check", str(path)) == 0
    assert "3 of 4 categories on, 1 with a threshold" in capsys.readouterr().out
    assert run("check", str(path), "--model", "nano") == 0  # pets stands for S2
    saved(tmp_path, FILE.replace(", hazard: S2", ""))
    assert run("check", str(path), "--model", "nano") == 2
    assert capsys.readouterr().err.startswith("error: this guard reads no rules")
    assert run("check") == 2


def test_a_reading_is_made_once_per_policy() -> None:
    prompter: Prompter = tiny_guard().prompter
    assert prompter.reading(Policy(threshold=0.3)) is prompter.reading(Policy(threshold=0.3))
