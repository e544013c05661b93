"""Vector environments in all three ways to begin the next episode, against single environments played by hand."""

import collections

import jax
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorWrapper
from gymnasium.wrappers import vector as wrappers
from gymnasium.wrappers.utils import RunningMeanStd
from host_games import FORMS, KINDS, MODES, Stairs, Vector, make_vector

from a3c_jax.autoreset import VectorPlayer, autoreset_mode

N, STEPS = 3, 40


def play(player, actions, before=lambda: None):
    """What is acted upon at each step, and what follows, as it was at that moment."""
    observation = jax.tree.map(np.array, player.begin(np.zeros(player.episode.shape, np.int32)))
    for action in actions:
        acted_upon = observation
        before()
        stepped = jax.tree.map(np.array, player.step(action))
        observation = stepped.observation
        yield acted_upon, stepped


def actions_of(seed, steps=STEPS, num_envs=N):
    return np.random.default_rng(seed).integers(0, 3, (steps, num_envs))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def part(tree, n):
    return jax.tree.map(lambda x: x[n], tree)


def recorded(kind, mode, form="array", entropy=(1, 2), num_envs=N, episodes_per_seed=1):
    """A player, and the seeds that each of its environments gets."""
    seeds = [[] for _ in range(num_envs)]
    numbers = iter(seeds)
    vector = make_vector(kind, mode, lambda: Stairs(form, next(numbers)), num_envs)
    return VectorPlayer(vector, entropy, episodes_per_seed=episodes_per_seed), seeds


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_that_of_a_single_environment(kind, mode, form):
    player, seeds = recorded(kind, mode, form)
    actions, alone = actions_of(0), [Stairs(form) for _ in range(N)]
    episode, begins, invalid = np.zeros(N, int), np.ones(N, bool), 0
    for k, (acted_upon, stepped) in enumerate(play(player, actions)):
        valid = np.ones(N, bool) if stepped.valid is None else stepped.valid
        for n, env in enumerate(alone):
            if begins[n]:
                first, _ = env.reset(seed=seeds[n][episode[n]])
                if valid[n]:
                    assert_same(part(acted_upon, n), first)
                else:  # the step only begins the episode: its action and its reward count for nothing
                    assert_same(part(stepped.observation, n), first)
                    assert stepped.reward[n] == 0.0
                    assert not stepped.terminated[n] and not stepped.truncated[n]
                    begins[n], invalid = False, invalid + 1
                    continue
            final, reward, terminated, truncated, _ = env.step(actions[k, n])
            assert_same(part(stepped.final_observation, n), final)
            assert stepped.reward[n] == np.float32(reward)
            assert (stepped.terminated[n], stepped.truncated[n]) == (terminated, truncated)
            begins[n] = terminated or truncated
            episode[n] += begins[n]
            if not begins[n]:
                assert_same(part(stepped.observation, n), final)
        waits = begins if player.marks_beginnings else 0
        np.testing.assert_array_equal(player.episode, episode - waits)
    assert (episode > 3).all()
    # Gymnasium's own vectors are reset at once, each environment with a seed of its own.
    marks = mode == "NextStep" and kind not in ("sync", "shared")
    assert player.marks_beginnings == marks == (invalid > 0)


@pytest.mark.parametrize(
    ("kind", "mode"), [("sync", "Disabled"), ("sync", "NextStep"), ("wrapped", "Disabled")]
)
def test_each_episode_has_a_seed_of_its_own_which_only_the_entropy_determines(kind, mode):
    def seeds_of(entropy):
        player, seeds = recorded(kind, mode, entropy=entropy)
        list(play(player, actions_of(2)))
        assert [len(mine) for mine in seeds] == (player.episode + 1).tolist()
        return sum(seeds, [])

    seeds = seeds_of((1, 2))
    assert None not in seeds and len(seeds) > 3 * N
    assert seeds == seeds_of((1, 2))
    others = [seeds_of(entropy) for entropy in [(1, 3), (2, 1), (0, 0)]]
    everything = seeds + sum(others, [])
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize(
    ("kind", "mode"), [("wrapped", "SameStep"), ("dense", "Disabled"), ("objects", "NextStep")]
)
def test_a_vector_that_seeds_itself_gets_one_seed_and_goes_on_with_its_own_generator(kind, mode):
    player, seeds = recorded(kind, mode)
    list(play(player, actions_of(2)))
    assert all(len(mine) > 3 and mine[0] is not None and set(mine[1:]) == {None} for mine in seeds)
    assert not player.can_put_back or kind == "wrapped"


def test_several_episodes_follow_one_another_from_one_seed():
    player, seeds = recorded("sync", "Disabled", episodes_per_seed=3)
    each, each_seeds = recorded("sync", "Disabled")
    list(play(player, actions_of(2, 3 * STEPS)))
    each.begin(np.zeros(N, np.int32))
    for episode in range(1, player.episode.max() + 1):
        each.begin(np.full(N, episode, np.int32))
    for mine, all_of_them in zip(seeds, each_seeds, strict=True):
        expected = [seed if k % 3 == 0 else None for k, seed in enumerate(all_of_them)]
        assert len(mine) > 6 and mine == expected[: len(mine)]


def test_where_only_all_environments_can_be_seeded_each_is_reset_once():
    player, seeds = recorded("dense", "Disabled", episodes_per_seed=3)
    player.begin(np.full(N, 5, np.int32))
    assert [len(mine) for mine in seeds] == [1] * N and (player.episode == 5).all()


@pytest.mark.parametrize("episodes_per_seed", [1, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("kind", "mode"), [("sync", "Disabled"), ("shared", "NextStep"), ("wrapped", "Disabled")]
)
def test_running_episodes_are_put_back_where_they_were(kind, mode, form, episodes_per_seed):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        steps, num_envs = int(rng.integers(0, 12)), int(rng.integers(1, 5))
        actions = actions_of(seed, steps + 8, num_envs)
        recorded_so = kind, mode, form, (seed,), num_envs, episodes_per_seed
        player, _ = recorded(*recorded_so)
        observation, length = player.begin(np.full(num_envs, 5, np.int32)), np.zeros(num_envs, int)
        paid = np.zeros(num_envs, np.float32)
        for action in actions[:steps]:
            stepped = player.step(action)
            observation, ended = (
                jax.tree.map(np.array, stepped.observation),
                stepped.terminated | stepped.truncated,
            )
            length, paid = np.where(ended, 0, length + 1), np.where(ended, 0, paid + stepped.reward)
        other, _ = recorded(*recorded_so)
        assert player.can_put_back and other.can_put_back
        if rng.random() < 0.5:  # it may have played before
            list(play(other, actions_of(99, 7, num_envs)))
        # What is remembered may begin before the longest episode does.
        longest = length.max() if num_envs else 0
        episode = player.episode.copy()
        found = other.put_back(episode, actions[steps - longest : steps], length)
        assert_same(found, (observation, paid))
        assert_same(other.episode, episode)
        for action in actions[steps:]:
            assert_same(jax.tree.map(np.array, other.step(action)), player.step(action))


def test_the_numbers_of_episodes_that_were_read_stay_what_they_were():
    for kind in KINDS:
        for mode in MODES:
            player, _ = recorded(kind, mode)
            player.begin(np.zeros(N, np.int32))
            read = [player.episode]
            for action in actions_of(3):
                player.step(action)
                read.append(player.episode)
            assert all(np.all(a <= b) for a, b in zip(read, read[1:], strict=False))
            np.testing.assert_array_equal(read[0], 0, err_msg=f"{kind} {mode}")


def test_vectors_of_one_class_in_different_modes_do_not_disturb_each_other():
    # Gymnasium writes the mode into a dict that all environments of a class share.
    vectors = {mode: SyncVectorEnv([Stairs] * 2, autoreset_mode=mode) for mode in MODES}
    assert {mode: autoreset_mode(vector) for mode, vector in vectors.items()} == {
        m: m for m in MODES
    }


def test_a_vector_that_does_not_say_how_it_begins_anew_is_refused():
    for metadata in ({}, None, {"autoreset_mode": "Sometimes"}):
        vector = Vector(Stairs, 2)
        vector.metadata = metadata
        with pytest.raises(
            ValueError, match=r"metadata\['autoreset_mode'\] .* from Vector; set it to"
        ):
            VectorPlayer(vector)
    vector.metadata = {"autoreset_mode": "NextStep"}  # what it is called is enough
    assert VectorPlayer(vector).marks_beginnings


class Lives(Vector):
    """Loses a life where the action is 2, of three; and the game with the last one."""

    def reset(self, *, seed=None, options=None):
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        self.lives = np.where(mask, 3, getattr(self, "lives", 0))
        return super().reset(seed=seed, options=options)

    def step(self, actions):
        *rest, info = super().step(actions)
        self.lives = self.lives - (actions == 2)
        return *rest, {**info, "lives": self.lives}


class AtariVectorEnv(Lives):
    """Known by its name to take a seed for each environment that is reset."""

    def reset(self, *, seed=None, options=None):
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        assert seed.shape == (mask.sum(),)
        for n, s in zip(np.flatnonzero(mask), seed, strict=True):
            self.now[n], _ = self.envs[n].reset(seed=int(s))
            self.ended[n] = False
        self.lives = np.where(mask, 3, getattr(self, "lives", 0))
        return self._together(self.now, self.observation), {}


class Long(Stairs):
    def reset(self, **options):
        observation = super().reset(**options)
        self.length += 100
        return observation


def test_a_life_is_lost_where_there_are_fewer_and_the_episode_goes_on():
    player = VectorPlayer(Lives(Long, 2), life_loss=True)
    player.begin(np.zeros(2, np.int32))
    lost = [player.step(np.array(a)).life_lost.tolist() for a in [(0, 0), (0, 2), (2, 2), (1, 0)]]
    assert lost == [[False, False], [False, True], [True, True], [False, False]]


def lives_of(kind):
    """The lives that were lost in each step, those that should have been, and where a game has begun."""
    player = VectorPlayer(kind(Stairs, N), life_loss=True)
    player.begin(np.zeros(N, np.int32))
    first = np.ones(N, bool)
    for action in actions_of(4):
        stepped = player.step(action)
        ended = stepped.terminated | stepped.truncated
        yield stepped.life_lost, (action == 2) & ~ended, first
        first = ended


def test_an_episode_s_end_is_not_a_lost_life_and_a_new_game_has_not_lost_one():
    lost = 0
    for found, expected, first in lives_of(Lives):
        # This one does not say with how many lives a game begins.
        np.testing.assert_array_equal(found, expected & ~first)
        lost += found.sum()
    assert lost > 10


class SaysLives(Lives):
    """Says how many lives a game begins with."""

    def reset(self, **options):
        observation, info = super().reset(**options)
        return observation, {**info, "lives": self.lives}


def test_a_life_lost_in_the_first_step_is_seen_if_reset_says_how_many_there_are():
    lost = 0
    for found, expected, first in lives_of(SaysLives):
        np.testing.assert_array_equal(found, expected)
        lost += (found & first).sum()
    assert lost > 5


@pytest.mark.parametrize("mode", MODES)
def test_a_game_may_begin_with_fewer_lives_than_the_last_one_had(mode):
    class Gains(Lives):
        """Gains a life with every step, and has one of them at a game's start."""

        def step(self, actions):
            *rest, info = Vector.step(self, actions)
            began = rest[0][:, 1] == 0
            self.lives = np.where(began, 1, self.lives + 1)
            return *rest, {**info, "lives": self.lives}

    player = VectorPlayer(Gains(Stairs, N, mode), life_loss=True)
    assert not any(stepped.life_lost.any() for _, stepped in play(player, actions_of(5)))
    assert (player.episode > 3).all()


def test_what_was_played_on_the_way_to_a_running_episode_costs_no_life_in_it():
    class Gains(AtariVectorEnv):
        """Gains a life where the action is 1."""

        def step(self, actions):
            *rest, info = super().step(actions)
            self.lives = self.lives + (actions == 1)
            return *rest, {**info, "lives": self.lives}

    player = VectorPlayer(Gains(Long, 2, "NextStep"), (1,), life_loss=True)
    # The second environment's game begins now; until then it gains lives in another.
    player.put_back(np.zeros(2, np.int32), np.ones((4, 2), np.int64), np.array([4, 0]))
    assert player.step(np.array([0, 0])).life_lost.tolist() == [False, False]
    assert player.step(np.array([2, 2])).life_lost.tolist() == [True, True]


def test_life_loss_without_lives_is_refused():
    player = VectorPlayer(Vector(Stairs, 2), life_loss=True)
    player.begin(np.zeros(2, np.int32))
    with pytest.raises(
        ValueError, match=r"needs an environment that says info\['lives'\].*got only \[\]"
    ):
        player.step(np.zeros(2, np.int64))


def test_a_wrapper_that_resets_says_so_itself():
    class Resets(VectorWrapper):
        metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}

    assert autoreset_mode(Resets(SyncVectorEnv([Stairs], autoreset_mode="Disabled"))) == "SameStep"
    vector = Vector(Stairs, 1, "SameStep")
    vector.autoreset_mode = True  # of another meaning
    assert autoreset_mode(vector) == "SameStep"


def test_a_vector_that_withholds_the_last_observation_is_refused():
    class Withholds(Vector):
        def step(self, actions):
            *rest, _ = super().step(actions)
            return *rest, {"final_observation": None}  # its name in older versions

    player = VectorPlayer(Withholds(Stairs, N, "SameStep"))
    with pytest.raises(
        ValueError, match=r"in info\['final_obs'\], got only \['final_observation'\]; give"
    ):
        list(play(player, actions_of(6)))


@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_last_observations_may_be_in_other_containers_than_the_space_s(form):
    class Loose(Stairs):
        def observe(self):
            shown = super().observe()
            if form == "tuple":
                return list(shown)
            return collections.OrderedDict(reversed(shown.items()), more=np.zeros(7))

    same, loose = (
        play(
            VectorPlayer(make_vector("sync", "SameStep", lambda k=k: k(form), N), (1,)),
            actions_of(0),
        )
        for k in (Stairs, Loose)
    )
    for (_, one), (_, other) in zip(same, loose, strict=True):
        assert_same(one.final_observation, other.final_observation)


def test_a_reset_that_does_not_look_at_its_mask_is_refused():
    class ResetsAll(Vector):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=seed)

    player = VectorPlayer(ResetsAll(Stairs, N))
    with pytest.raises(ValueError, match="must leave the environments outside the mask as they"):
        list(play(player, actions_of(6)))


@pytest.mark.parametrize("index", [1, 2, 3])
def test_numbers_of_another_shape_are_refused(index):
    class Odd(Vector):
        def step(self, actions):
            results = list(super().step(actions))
            results[index] = results[index][:, None]
            return results

    player = VectorPlayer(Odd(Stairs, N))
    player.begin(np.zeros(N, np.int32))
    with pytest.raises(ValueError, match=rf"reward\[{N}\], .*got .*\[{N}, 1\]"):
        player.step(np.zeros(N, np.int64))


def test_infos_in_another_form_are_not_looked_at():
    class Lists(Vector):
        def reset(self, **options):
            return super().reset(**options)[0], []

        def step(self, actions):
            return *super().step(actions)[:4], []

    assert len(list(play(VectorPlayer(Lists(Stairs, N)), actions_of(3)))) > 3


@pytest.mark.parametrize("form", ["dense", "objects"])
def test_a_wrapper_that_leaves_the_last_observation_as_it_was_is_refused(form):
    class Stacks(Vector):
        """Shows each observation twice, but for the last one of an episode."""

        def reset(self, **options):
            observation, info = super().reset(**options)
            return np.stack([observation, observation], 1), info

        def step(self, actions):
            observation, *rest, info = super().step(actions)
            if "final_obs" in info and form == "objects":
                last = np.empty(self.num_envs, object)
                last[:] = list(np.asarray(info["final_obs"]))
                info = {**info, "final_obs": last}
            return np.stack([observation, observation], 1), *rest, info

    player = VectorPlayer(Stacks(Stairs, N, "SameStep"))
    with pytest.raises(
        ValueError, match=r"'final_obs'\] must hold observations of the shape \[2, "
    ):
        list(play(player, actions_of(6)))


# Gymnasium's wrappers of vectors. Those of observations refuse SameStep themselves.


def played(vector):
    player = VectorPlayer(vector, (1, 2))
    return player, list(play(player, actions_of(7)))


def sync(mode):
    return SyncVectorEnv([Stairs] * N, autoreset_mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_statistics_of_episodes_change_nothing(mode):
    player, steps = played(wrappers.RecordEpisodeStatistics(sync(mode)))
    _, expected = played(VectorWrapper(sync(mode)))
    assert_same(steps, expected)
    assert player.can_put_back == (mode == "Disabled")


@pytest.mark.parametrize("mode", ["Disabled", "NextStep"])
def test_observations_are_transformed_wherever_they_are_seen(mode):
    transformed = wrappers.TransformObservation(sync(mode), lambda x: 2 * x)
    _, steps = played(transformed)
    _, expected = played(VectorWrapper(sync(mode)))
    for (acted_upon, stepped), (plain, plainly) in zip(steps, expected, strict=True):
        assert_same(acted_upon, 2 * plain)
        assert_same(stepped.observation, 2 * plainly.observation)
        assert_same(stepped.final_observation, 2 * plainly.final_observation)
        assert_same(stepped.valid, plainly.valid)


def test_observations_are_normalised_by_what_all_environments_have_shown_so_far():
    player, steps = played(wrappers.NormalizeObservation(sync("NextStep")))
    _, expected = played(VectorWrapper(sync("NextStep")))
    assert player.marks_beginnings and not player.can_put_back
    moments = RunningMeanStd(shape=(3,), dtype=np.float32)
    for (acted_upon, stepped), (plain, plainly) in zip(steps, expected, strict=True):
        moments.update(plain)
        # Each is normalised once, by the moments of its time, and is the same where it is acted upon.
        normalised = (plain - moments.mean) / np.sqrt(moments.var + 1e-8)
        np.testing.assert_allclose(acted_upon, normalised, rtol=1e-5, atol=1e-6)
        assert_same(stepped.valid, plainly.valid)
        assert_same(stepped.final_observation, stepped.observation)
