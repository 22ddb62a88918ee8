"""depthwise_conv1d on a GPU: the sums of causal_conv1d, which begin ``ahead`` positions later."""

from ..causal_conv1d import gpu as causal

supports, forward, backward = causal.supports, causal.filtered, causal.backward
