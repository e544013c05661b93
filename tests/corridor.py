"""The README's example of an own environment, as its readers write it into a file."""

import gymnax
import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces


@struct.dataclass
class State(environment.EnvState):  # which has the field time
    cell: jax.Array


class Corridor(environment.Environment):
    """Walk right along ten cells. Every step costs 0.1, and after 100 steps the episode is cut."""

    default_params = environment.EnvParams(max_steps_in_episode=100)

    def reset_env(self, key, params):
        return jnp.zeros(1), State(time=0, cell=jnp.array(0))

    def step_env(self, key, state, action, params):
        state = State(time=state.time + 1, cell=jnp.clip(state.cell + 2 * action - 1, 0, 10))
        observation = jnp.array([state.cell / 10.0])
        return observation, state, jnp.float32(-0.1), state.cell == 10, {}

    def observation_space(self, params):
        return spaces.Box(0.0, 1.0, (1,))

    def action_space(self, params):
        return spaces.Discrete(2)


gymnax.register("Corridor", Corridor)  # a name for scripts: corridor:Corridor
