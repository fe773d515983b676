package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"testing"
)

// BenchmarkSign is what one machine that joins or renews costs the server in CPU:
// the request's signature is checked, and a certificate signed.
func BenchmarkSign(b *testing.B) {
	i := must(NewIssuer(must(NewAuthoritySpec(start))))
	csr := csrFor(b, must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)))
	for b.Loop() {
		if _, err := i.Sign(csr, Node("n1"), start); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkNewIssuer is what reading the Authority costs whenever it is needed.
func BenchmarkNewIssuer(b *testing.B) {
	spec := must(Successor(must(NewAuthoritySpec(start)), start))
	for b.Loop() {
		if _, err := NewIssuer(spec); err != nil {
			b.Fatal(err)
		}
	}
}
