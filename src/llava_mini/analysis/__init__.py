"""What a model looks at, as numbers and pictures: the analyses of section 3 and of the appendices A and F."""
