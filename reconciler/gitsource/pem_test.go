package gitsource

import (
	"encoding/pem"
	"io"
)

func encodePEM(w io.Writer, kind string, der []byte) {
	if err := pem.Encode(w, &pem.Block{Type: kind, Bytes: der}); err != nil {
		panic(err)
	}
}
func maybeHelper() bool { return false }
