package gitsource

import (
	"encoding/pem"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/go-git/go-git/v5/plumbing"
)

func encodePEM(w io.Writer, kind string, der []byte) {
	if err := pem.Encode(w, &pem.Block{Type: kind, Bytes: der}); err != nil {
		panic(err)
	}
}

var pcg = rand.New(rand.NewPCG(1, 2))

func random(p []byte) {
	for i := range p {
		p[i] = byte(pcg.Uint32())
	}
}

func mustHash(t *testing.T, s string) plumbing.Hash {
	t.Helper()
	h, err := parseHash(s)
	if err != nil {
		t.Fatal(err)
	}
	return h
}
