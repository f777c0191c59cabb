"""Scores of models whose videos are known: drawn ones, and drawn ones with a fault."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from skyreels_jax.errors import RequestError
from skyreels_jax.evaluation.quality import LONG, LONG_OVERLAP, joins, table, write_cards
from skyreels_jax.evaluation.scores import (
    FPS,
    FRAMES,
    MINI_SIZE,
    Share,
    first_frame,
    held_out_scenes,
    jump_at_joins,
    lasting_scenes,
    score,
    score_seconds,
)
from skyreels_jax.hub import locate
from skyreels_jax.moving_shapes.judge import detect_things
from skyreels_jax.moving_shapes.render import render
from skyreels_jax.moving_shapes.scene import HELD_OUT, Combination, Scene


def drawn(scene: Scene, seed: int) -> np.ndarray:
    del seed
    return render(scene, frames=FRAMES, fps=float(FPS), size=MINI_SIZE)


def test_a_perfect_model_is_perfect_and_others_are_not():
    scenes = held_out_scenes(24)
    found = score(drawn, scenes)
    assert [str(found.share(n)) for n in ("colour", "kind", "motion", "all")] == [
        "100.0% (86.2% to 100.0%)"
    ] * 4
    assert "100.0%" in table({"drawn": found})

    # Backwards in time every other video: what moves, grows or shrinks does the contrary.
    turned = score(lambda s, n: drawn(s, n)[:: -1 if n % 2 else 1], scenes)
    assert turned.share("colour").right == turned.share("kind").right == 24
    assert turned.share("motion").right == turned.share("all").right == 12

    other = score(lambda s, n: drawn(scenes[(n + 1) % 24], n), scenes)
    assert other.share("all").right == 0


def test_scenes_are_held_out_ones_and_ones_that_last():
    scenes = held_out_scenes(48)
    things = [scene.things[0] for scene in scenes]
    assert {Combination(t.colour, t.kind, t.direction) for t in things} == set(HELD_OUT)
    assert held_out_scenes(48) == scenes != held_out_scenes(48, seed=1)
    for scene in lasting_scenes(20):
        video = render(scene, frames=LONG, fps=float(FPS), size=MINI_SIZE)
        assert detect_things(video, FPS)[0].steady


def drawn_for(seconds: int, scene: Scene) -> np.ndarray:
    return render(scene, frames=seconds * FPS + 1, fps=float(FPS), size=MINI_SIZE)


@pytest.mark.parametrize("motion", ["still", "bounce"])
def test_every_second_is_judged_by_itself(motion):
    scenes = lasting_scenes(3, seed=1, motions=(motion,))
    assert {scene.things[0].motion for scene in scenes} == {motion}
    found = score_seconds(lambda scene, _: drawn_for(4, scene), scenes, 4)
    assert found.share("all").right == len(found.verdicts) == len(found.sheets) == 12
    assert found.metrics == {"at_end": 1, "right_until": 4}
    assert "at_end 1, right_until 4" in table({"drawn": found})

    # The last video shows the next one's scene from its third second on, the others do not.
    def spoilt(scene: Scene, number: int) -> np.ndarray:
        frames = drawn_for(4, scene)
        if number == 2:
            frames[2 * FPS :] = drawn_for(4, scenes[0])[2 * FPS :]
        return frames

    found = score_seconds(spoilt, scenes, 4)
    assert [verdict.all for verdict in found.verdicts[-4:]] == [True, True, False, False]
    assert found.share("all").right == 10
    assert found.metrics["at_end"] == pytest.approx(2 / 3)
    gone = score_seconds(lambda scene, _: 0 * drawn_for(4, scene), scenes[:1], 4)
    assert gone.metrics == {"at_end": 0, "right_until": 0}


def test_intervals_are_wilsons():
    # Brown, Cai and DasGupta, "Interval Estimation for a Binomial Proportion" (2001): its formula
    # solved as a quadratic here, in other words.
    for right, of in ((0, 10), (7, 10), (186, 200), (50, 50)):
        z, p = 1.96, right / of
        roots = np.roots([1 + z * z / of, -2 * p - z * z / of, p * p])
        np.testing.assert_allclose(Share(right, of).interval, sorted(np.real(roots)), atol=1e-7)


# Steps of 0.0125 are below what can be seen, 0.02; a jump is as long as given and one step.
@pytest.mark.parametrize(("shift", "expected"), [(0.0, 0.625), (0.1, 5.6)])
def test_a_jump_at_a_join_is_seen(shift: float, expected: float):
    scene = lasting_scenes(1)[0]
    thing = replace(
        scene.things[0], motion="move", direction="right", speed="slow", x=0.2, y=0.5, radius=0.15
    )
    video = render(replace(scene, things=(thing,)), frames=33, fps=float(FPS), size=MINI_SIZE)
    moved = replace(thing, x=thing.x + shift)
    after = render(replace(scene, things=(moved,)), frames=33, fps=float(FPS), size=MINI_SIZE)
    join = joins()[0]
    seen = detect_things(np.concatenate([video[:join], after[join:]]), FPS)[0]
    assert jump_at_joins(seen, [join]) == pytest.approx(expected, rel=0.15)


def test_joins_are_where_windows_begin():
    assert joins() == tuple(range(17, LONG, 17 - LONG_OVERLAP))


def test_the_image_given_is_the_first_frame():
    scene = held_out_scenes(1)[0]
    np.testing.assert_array_equal(first_frame(scene), drawn(scene, 0)[0])


def test_scores_are_put_into_the_cards_of_their_models(tmp_path: Path):
    text, image = score(drawn, held_out_scenes(3)), score(drawn, held_out_scenes(2))
    folders = {kind: tmp_path / kind for kind in ("df", "i2v")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "README.md").write_text("# A\n\nEVALUATION\n\n| other | table |\n")
    write_cards({"text to video": text, "image to video": image}, folders)
    cards = {kind: (folder / "README.md").read_text() for kind, folder in folders.items()}
    assert cards["df"] == f"# A\n\n{table({'text to video': text})}\n| other | table |\n"
    assert cards["i2v"] == f"# A\n\n{table({'image to video': image})}\n| other | table |\n"
    # Again: a row in place of the old one, others stay.
    write_cards({"VAE": image}, folders)
    write_cards({"text to video": image}, folders)
    card = (folders["df"] / "README.md").read_text()
    assert card == f"# A\n\n{table({'text to video': image, 'VAE': image})}\n| other | table |\n"
    assert (folders["i2v"] / "README.md").read_text() == cards["i2v"]
    (folders["df"] / "README.md").write_text("# A\n")
    with pytest.raises(RequestError, match="no table of scores"):
        write_cards({"VAE": image}, folders)


def test_the_cards_of_the_package_have_the_table_that_is_written():
    head = table({})
    for model in ("mini", "mini-i2v"):
        assert head in (locate(model).folder / "README.md").read_text("utf-8")
