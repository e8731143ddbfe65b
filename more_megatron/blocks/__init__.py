"""Layer side: recurrent blocks, kinds of experts, MoE layers, routers and dispatchers, on two backends."""
