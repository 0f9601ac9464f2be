"""What a recipe takes, before anything is started; and plan against fact."""
