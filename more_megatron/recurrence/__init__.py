"""The recurrence core: how many steps are taken, and how they are taken."""
