"""ResNets and ResNeXts whose wiring is learned."""
