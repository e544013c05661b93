"""A3C on Atari games: `python -m experiments.atari --preset pong`.

It needs ale-py: `pip install -e '.[atari]'`. The games and the network are as in the paper: four frames a step, the last
four steps as gray images of 84x84, up to 30 no-ops at the start, rewards clipped for learning, two convolutions and a
dense layer that actor and critic share. Where the settings depart from the paper's, docs/real-environments.md says why.
Reported returns are the games' own scores. One step is four frames.

`--core lstm` adds the paper's LSTM. `--environment "ale:breakout?life_loss=True&repeat_action_probability=0.25"` takes sticky
actions, and `--environment "ale:qbert?size=42"` small images.
"""

from a3c_jax.config import A3CConfig
from experiments.command_line import main


def settings(environment: str) -> A3CConfig:
    """The paper's settings, the same for every game, but for the number of environments and RMSProp's epsilon."""
    return A3CConfig(
        environment=environment,
        envs_per_worker=16,
        t_max=5,
        torso="atari",
        hidden_sizes=(256,),
        activation="relu",
        shared_torso=True,
        reward_clip=1.0,
        optimizer="shared_rmsprop",
        rmsprop_epsilon=1e-8,
        learning_rate=7e-4,
        learning_rate_schedule="linear",
        max_steps=10_000_000,
        solved_window=30,
    )


PRESETS = {
    "pong": settings("ale:pong"),
    "breakout": settings("ale:breakout?life_loss=True"),
    "beam-rider": settings("ale:beam_rider?life_loss=True"),
    "qbert": settings("ale:qbert?life_loss=True"),
    "seaquest": settings("ale:seaquest?life_loss=True"),
    "space-invaders": settings("ale:space_invaders?life_loss=True"),
}

if __name__ == "__main__":
    main("atari", "Train A3C on an Atari game.", PRESETS, evaluation_episodes=30)
