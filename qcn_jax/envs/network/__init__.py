"""What agents reach of the network: nothing, or package indexes and documentation through a proxy that chooses."""
