//go:build !decree_next_format

package command

const (
	newest     = 2
	sinceParts = 2
)
