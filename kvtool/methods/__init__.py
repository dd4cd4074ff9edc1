"""Published methods: one file each, named as its paper names it; each fills slots of a plan from a trace or a model."""
