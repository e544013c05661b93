"""Atari's games by name: what is played, what is learnt from, and that it can be played again."""

import contextlib
import functools
import json
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from host_games import Worker
from small_runs import (
    assert_equal_runs,
    assert_exact_counters,
    cut_short,
    refused,
    replay,
    train_together,
)

import a3c_jax
from a3c_jax import A3CConfig, CheckpointFolder, evaluate, find_checkpoint, random_policy
from a3c_jax.algorithm import a3c
from a3c_jax.distributions import Categorical
from a3c_jax.environments import HostEnvironment, make
from experiments.measurements import atari_games

pytest.importorskip("ale_py")
from ale_py.vector_env import AtariVectorEnv  # noqa: E402

SHORT = "max_num_frames_per_episode=240&size=16&stack_num=2"  # 60 steps
SMALL = {"num_workers": 1, "envs_per_worker": 2, "t_max": 10, "hidden_sizes": (4,), "seed": 5}
AT_NEWEST = functools.partial(a3c, learns_at_newest=True)


def random_actions(environment, steps, num_envs=2, seed=0):
    number = environment.num_actions
    return np.random.default_rng(seed).integers(0, number, (steps, num_envs))


def play(environment, steps, num_envs=2, seed=0, entropy=(1, 2)):
    """So many random steps."""
    with environment.playing(num_envs, entropy) as player:
        yield environment.begin(player, np.zeros(num_envs, np.int32))
        for action in random_actions(environment, steps, num_envs, seed):
            yield player.step(environment.decode(action))


# Names


@pytest.mark.parametrize(
    "name", ["SpaceInvaders", "space_invaders", "space-invaders", "SPACEINVADERS", "Space Invaders"]
)
def test_games_are_found_however_their_names_are_written(name):
    environment = make(f"ale:{name}")
    assert environment.num_actions == 6 and environment.observation_shape == (4, 84, 84)
    assert not environment.continuous and not environment.marks_beginnings


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Pongg", r"must name a game of ale-py, got 'ale:Pongg'; did you mean ale:pong or"),
        ("Space_Invader", r"did you mean ale:space_invaders"),
        ("xyzxyzxyz", r"got 'ale:xyzxyzxyz'; did you mean ale:pong\?"),
        ("", r"must name a game of ale-py, got 'ale:'"),
        ("Pong?frame_skip=2", r"takes size, life_loss, step_seconds, episodes_per_seed, .*frameskip.*, got frame_skip; leave"),
        ("Pong?reward_clipping=True", r"got reward_clipping; leave it out"),
        ("Pong?episodic_life=True", r"got episodic_life; use life_loss"),
        ("Pong?autoreset_mode='SameStep'", r"got autoreset_mode; leave it out"),
        ("Pong?frameskip=0", r"frameskip of environment .* must be an integer of at least 1, got 0"),
        ("Pong?img_width='a'", r"img_width of environment .* must be an integer of at least 1, got 'a'"),
        ("Pong?stack_num=-1", r"stack_num of environment .* must be an integer of at least 1, got -1"),
        ("Pong?noop_max=-1", r"noop_max of environment .* must be an integer of at least 0, got -1"),
        ("Pong?repeat_action_probability=2", r"repeat_action_probability of .* must be in \[0, 1\], got 2"),
        ("Pong?max_num_frames_per_episode=60", r"must be larger than twice noop_max, got 60"),
        ("x.y:Pong", r"must name a game of ale-py, got 'ale:x.y:Pong'"),
        ("Pong?num_threads='two'", r"cannot be made by ale-py: .*incompatible function arguments"),
        ("Pong?size=four", r"parameters of environment .* must be numbers"),
    ],
)  # fmt: skip
def test_wrong_names_and_parameters_are_refused_in_one_sentence(name, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(f"ale:{name}")
    assert "\n" not in str(caught.value)


def test_without_ale_py_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    monkeypatch.setitem(sys.modules, "ale_py.vector_env", None)
    with pytest.raises(
        ValueError, match=r"'ale:Pong' needs ale-py, which is not installed; run pip install"
    ):
        make("ale:Pong")


def test_a_size_and_other_parameters_reach_the_emulator():
    environment = make("ale:Pong?size=42&stack_num=2&full_action_space=True", grayscale=False)
    assert environment.observation_shape == (2, 42, 42, 3) and environment.num_actions == 18
    first = next(play(environment, 0))
    assert first.shape == (2, 2, 42, 42, 3) and first.dtype == np.uint8 and first.std() > 1
    assert make("ale:Pong?img_height=50").observation_shape == (4, 50, 84)


def test_continuous_actions_are_played():
    environment = make(f"ale:Pong?continuous=True&{SHORT}")
    assert environment.continuous and environment.num_actions == 3
    with environment.playing(2) as player:
        environment.begin(player, np.zeros(2, np.int32))
        for action in np.random.default_rng(0).normal(size=(5, 2, 3)):
            player.step(environment.decode(np.float32(action)))


# What is played


@pytest.mark.parametrize("name", ["ale:SpaceInvaders?size=42", "gymnasium:ALE/SpaceInvaders-v5"])
def test_rewards_are_the_game_s_own(name):
    rewards = [s.reward for s in list(play(make(name), 150, 4))[1:]]
    assert set(np.unique(rewards)) - {0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 200.0} == set()
    assert np.max(rewards) >= 5.0


def test_rewards_are_clipped_for_learning_alone():
    config = A3CConfig(**SMALL | {"t_max": 100}, reward_clip=1.0)
    environment = make(f"ale:SpaceInvaders?{SHORT}")
    worker = Worker(config, environment, algorithm=AT_NEWEST)
    ((segment, _, statistics),) = worker.segments(1)
    rewards, ended = np.asarray(segment.trajectory.reward_t), np.asarray(statistics.episodes.ended)
    assert set(np.unique(rewards)) == {0.0, 1.0}
    returns = np.asarray(statistics.episodes.episode_return)[ended]
    assert returns.max() >= 5.0 and (returns % 5 == 0).all()


def test_episodes_are_cut_by_their_time_limit_and_the_next_ones_are_others():
    environment, firsts, lengths = make(f"ale:Breakout?{SHORT}"), [], np.zeros(2, int)
    for stepped in list(play(environment, 200))[1:]:
        lengths += 1
        ended = stepped.terminated | stepped.truncated
        for n in np.flatnonzero(ended):
            assert stepped.truncated[n] and 50 <= lengths[n] <= 61
            assert (stepped.observation[n] != stepped.final_observation[n]).any()
            firsts.append(stepped.observation[n].tobytes())
        lengths[ended] = 0
    assert len(firsts) >= 6 and len(set(firsts)) > 1


# The loss of a life


def recording(lives):
    """Breakout, of which the lives after each step are written to a list."""

    def make_one(num_envs):
        vector = AtariVectorEnv(
            "breakout", num_envs, img_height=16, img_width=16, reward_clipping=False, num_threads=1
        )
        step = vector.step

        def recorded(action):
            results = step(action)
            lives.append(results[-1]["lives"].copy())
            return results

        vector.step = recorded
        return vector

    return make_one


def test_a_lost_life_is_a_termination_to_learn_from_and_nothing_else():
    config, lives = A3CConfig(**SMALL | {"t_max": 150}), []
    runs = {}
    for life_loss in (False, True):
        lives.clear()
        environment = HostEnvironment("Breakout", recording(lives), life_loss=life_loss)
        worker = Worker(config, environment, algorithm=AT_NEWEST)
        runs[life_loss] = list(worker.segments(3))
    counts = np.stack(lives)
    terminated, ended = (
        np.concatenate([np.asarray(x) for x in columns])
        for columns in zip(
            *((g.trajectory.terminated_t, s.episodes.ended) for g, _, s in runs[True]), strict=True
        )
    )
    lost = np.zeros_like(terminated)
    lost[1:] = (counts[1:] < counts[:-1]) & (counts[1:] < 5)
    np.testing.assert_array_equal(terminated, lost | ended)
    assert lost.sum() > 4 and ended.sum() >= 1
    # Played, and counted, is the same. The policy without memory does not see it either.
    for (a, state, statistics), (b, other, expected) in zip(runs[True], runs[False], strict=True):
        for field in ("action_tm1", "reward_t", "observation_tm1", "observation_t", "truncated_t"):
            x, y = (np.asarray(getattr(g.trajectory, field)) for g in (a, b))
            np.testing.assert_array_equal(x, y, err_msg=field)
        np.testing.assert_array_equal(b.trajectory.terminated_t, expected.episodes.ended)
        for x, y in zip(statistics.episodes, expected.episodes, strict=True):
            np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(state.episode_length, other.episode_length)


def test_a_recurrent_network_forgets_where_a_life_is_lost():
    config = A3CConfig(**SMALL | {"t_max": 1}, core="gru", core_size=3)
    lives, forgot = [], []
    environment = HostEnvironment("Breakout", recording(lives), life_loss=True)
    for _, state, _ in Worker(config, environment).segments(150):
        carries = jax.tree.leaves(state.carry)
        forgot.append(np.all([np.all(np.asarray(x) == 0, axis=-1) for x in carries], axis=0))
    counts, forgot = np.stack(lives), np.stack(forgot)
    np.testing.assert_array_equal(forgot[1:], counts[1:] < counts[:-1])
    assert forgot.sum() >= 2


# Playing it again

STICKY = f"ale:Breakout?repeat_action_probability=0.25&{SHORT}"


def config(**changes):
    return A3CConfig(**{**SMALL, "num_workers": 3, "max_steps": 560} | changes)


@pytest.mark.parametrize(
    "name",
    [
        f"{STICKY}&life_loss=True",
        pytest.param(f"ale:Pong?{SHORT}&num_threads=2", marks=pytest.mark.slow),
    ],
)
def test_a_run_of_three_workers_goes_on_and_replays_bit_for_bit(tmp_path, name):
    settings, checkpoint, saved = config(environment=name), None, []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for updates in (8, 9):
            checkpoint = cut_short(settings, updates, tmp_path, None, resume=checkpoint)
            assert checkpoint.states["episode_length"].max() > 0
            assert_exact_counters(checkpoint)
            saved.append(checkpoint)
        result = train_together(
            settings, None, resume=checkpoint, checkpoints=CheckpointFolder(tmp_path)
        )
        assert result.version == 28 and len(result.episodes.length) > 0
        assert_exact_counters(find_checkpoint(tmp_path))
        assert_equal_runs(replay(settings, result.schedule, None), result)
        assert_equal_runs(replay(settings, result.schedule, None, start=saved[-1]), result)


@pytest.mark.parametrize(
    ("name", "episodes"),
    [
        ("ale:Breakout?size=16", 16),
        ("ale:Breakout?size=16&episodes_per_seed=3", 3),
        ("ale:Breakout?size=16&repeat_action_probability=0.25", 1),  # how many draws an episode takes differs
        ("ale:IceHockey?size=16", 1),  # what is left of one game changes the next
    ],
)  # fmt: skip
def test_a_game_is_loaded_for_one_in_sixteen_episodes_if_that_is_enough(name, episodes):
    assert make(name).episodes_per_seed == episodes


def test_a_game_begins_as_its_seed_and_its_number_say_whatever_was_played_before():
    environment, firsts = make(f"ale:Breakout?{SHORT}&episodes_per_seed=3"), {}
    with contextlib.closing(environment.make(2, (3,))) as player:
        for seed in (0, 1):  # other actions, and so other games
            player.begin(np.zeros(2, np.int32))
            for action in random_actions(environment, 300, seed=seed):
                stepped = player.step(action)
                for n in np.flatnonzero(stepped.terminated | stepped.truncated):
                    first = firsts.setdefault((n, player.episode[n]), stepped.observation[n].copy())
                    np.testing.assert_array_equal(first, stepped.observation[n])
        for (n, episode), first in firsts.items():
            begun = player.begin(np.full(2, episode, np.int32))
            np.testing.assert_array_equal(begun[n], first)
    assert len(firsts) >= 8 and len({first.tobytes() for first in firsts.values()}) > 3


def test_sticky_actions_are_drawn_anew_in_each_episode():
    actions = random_actions(make(STICKY), 40)
    with make(STICKY).playing(2, (7,)) as player:
        observations = []
        for episode in (0, 1, 0):
            player.begin(np.full(2, episode, np.int32))
            observations.append([player.step(action).observation.copy() for action in actions])
    assert np.array_equal(observations[0], observations[2])
    assert not np.array_equal(observations[0], observations[1])


def test_an_evaluation_plays_whole_games_and_the_same_ones_for_the_same_key():
    environment = make(f"ale:SpaceInvaders?{SHORT}&life_loss=True")
    policy = random_policy(environment)
    a, b, other = (evaluate(policy, None, environment, jax.random.key(k), 3) for k in (0, 0, 1))
    assert (a.lengths >= 50).all() and (a.returns % 5 == 0).all()
    np.testing.assert_array_equal(a.returns, b.returns)
    np.testing.assert_array_equal(a.lengths, b.lengths)
    assert (a.returns != other.returns).any()


class OneTooMany:
    """A network whose policy knows only an action that the game lacks."""

    def init(self, key, observation):
        return {"logits": jnp.zeros(6)}

    def apply(self, params, observation):
        values = jnp.mean(observation, axis=(-3, -2, -1))
        return SixAndMore(params["logits"] + 0 * values[..., None]), values


@jax.tree_util.register_dataclass
class SixAndMore(Categorical):
    def sample(self, key):
        return super().sample(key) + 6


def test_an_action_out_of_range_is_an_error_and_no_endless_wait():
    settings = A3CConfig(num_workers=1, envs_per_worker=2, environment="ale:Pong?size=42")
    with pytest.raises(
        a3c_jax.WorkerError, match="actions of environment 'ale:Pong.size=42' must be at least 0"
    ):
        a3c_jax.train(settings, network=OneTooMany())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--games", "pong", "tetris"], "games must be among pong, breakout"),
        (["--games", "pong", "pong"], "games must be one or more, each once"),
        (["--evaluation-episodes", "0"], "evaluation_episodes must be >= 1, got 0"),
    ],
)
def test_a_measurement_of_games_refuses_wrong_ones(tmp_path, capsys, options, message):
    folder = tmp_path / "run"
    assert message in refused(capsys, atari_games, [*options, "--run-dir", str(folder)])
    assert not folder.exists()


@pytest.mark.slow
def test_a_tiny_measurement_of_games_leaves_its_results_and_goes_on(tmp_path, capfd):
    options = ["--games", "qbert", "space-invaders", "--max-steps", "10000"]
    options += ["--evaluation-episodes", "1", "--run-dir", str(tmp_path / "run")]
    folder = atari_games.main(options)
    assert (folder / "atari_games.png").read_bytes().startswith(b"\x89PNG")
    qbert, invaders = json.loads((folder / "atari_games.json").read_text())["games"]
    summary = json.loads((folder / "qbert" / "summary.json").read_text())
    assert qbert["frames"] == 4 * summary["environment_steps"] >= 40_000
    assert qbert["sampled"] == summary["evaluation"]["sampled"]["mean"]
    episodes = find_checkpoint(folder / "qbert").episodes
    assert qbert["training"] == episodes.episode_return[-100:].mean() > 0
    assert f"{qbert['training']:.1f}" in capfd.readouterr().out

    del summary["evaluation"]  # as if it had been killed behind the training
    (folder / "qbert" / "summary.json").write_text(json.dumps(summary))
    before = (folder / "space-invaders" / "summary.json").stat().st_mtime_ns
    atari_games.main(options)
    again, same = json.loads((folder / "atari_games.json").read_text())["games"]
    seconds = qbert.pop("hours"), again.pop("hours")
    assert again == qbert and seconds[1] >= seconds[0] and same == invaders
    assert (folder / "space-invaders" / "summary.json").stat().st_mtime_ns == before
