package pki

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base32"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"decree.dev/decree/schemas/api"
)

// Why a token admits nobody. To who has not shown the secret, the cluster does not
// tell which it was: all of them are ErrToken.
var (
	ErrToken        = errors.New("the join token is not valid")
	ErrTokenExpired = fmt.Errorf("%w: it has expired: make another with `decree token create`", ErrToken)
	ErrTokenRole    = fmt.Errorf("%w for this role: make one with `decree token create --role`", ErrToken)
	ErrTokenNode    = fmt.Errorf("%w for a machine of this name: it was made for another", ErrToken)
)

const (
	tokenPrefix  = "decree1"
	tokenID      = 10 // characters
	tokenSecret  = 32 // bytes
	maxTokenCAs  = 4
	maxTokenText = 512 // bytes
)

// Lower case, because the id is the name of an object.
var tokenEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// Token is what a person carries to a machine that joins: an id, a secret, and the
// fingerprints of the CAs by which the machine knows the cluster. As text it is
// "decree1.ID.SECRET.SHA256", with one more fingerprint for each more CA. Its String
// method leaves the secret out; see [Token.Text].
type Token struct {
	ID     string
	Secret string
	CAs    []string
}

// NewToken makes a token that admits machines as spec says (role, node, by whom)
// until ttl after now. All CAs that are trusted belong into it, so that a token made
// during a rotation outlives it. The text is shown once and kept nowhere: the object
// has the hash of the secret only.
func NewToken(cas []string, spec api.JoinTokenSpec, ttl time.Duration, now time.Time) (text string, obj *api.JoinToken, err error) {
	switch {
	case spec.Role != api.RoleServer && spec.Role != api.RoleAgent:
		return "", nil, fmt.Errorf("make join token: role %q is neither %s nor %s", spec.Role, api.RoleServer, api.RoleAgent)
	case ttl <= 0:
		return "", nil, fmt.Errorf("make join token: a lifetime of %v: it must be above zero", ttl)
	}
	if spec.Node != "" {
		if err := ValidNode(spec.Node); err != nil {
			return "", nil, fmt.Errorf("make join token: %w", err)
		}
	}
	raw := make([]byte, tokenSecret+8)
	if _, err := rand.Read(raw); err != nil {
		return "", nil, fmt.Errorf("make join token: %w", err)
	}
	t := Token{
		ID:     tokenEncoding.EncodeToString(raw[tokenSecret:])[:tokenID],
		Secret: tokenEncoding.EncodeToString(raw[:tokenSecret]),
		CAs:    slices.Clone(cas),
	}
	if _, err := ParseToken(t.Text()); err != nil {
		return "", nil, fmt.Errorf("make join token: %w", err)
	}
	spec.Hash = hashSecret(t.Secret)
	spec.Expires = metav1.NewTime(now.Add(ttl).UTC().Truncate(time.Second))
	return t.Text(), &api.JoinToken{ObjectMeta: metav1.ObjectMeta{Name: t.ID}, Spec: spec}, nil
}

// hashSecret needs no salt and no stretching: a secret has 256 random bits.
func hashSecret(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// ParseToken reads the text of a token. Its errors never show the secret.
func ParseToken(text string) (Token, error) {
	text = strings.TrimSpace(text)
	if len(text) > maxTokenText {
		return Token{}, fmt.Errorf("parse join token: %d bytes are too many for one", len(text))
	}
	parts := strings.Split(text, ".")
	switch {
	case parts[0] != tokenPrefix:
		return Token{}, fmt.Errorf("parse join token: it does not start with %q: copy the whole line that `decree token create` printed", tokenPrefix+".")
	case len(parts) < 4:
		return Token{}, fmt.Errorf("parse join token: it has %d parts instead of 4: it was cut off", len(parts))
	case len(parts) > 3+maxTokenCAs:
		return Token{}, fmt.Errorf("parse join token: more than %d fingerprints", maxTokenCAs)
	}
	t := Token{ID: parts[1], Secret: parts[2], CAs: parts[3:]}
	if err := checkToken(t.ID, t.Secret); err != nil {
		return Token{}, fmt.Errorf("parse join token: %w", err)
	}
	for _, fp := range t.CAs {
		if raw, err := hex.DecodeString(fp); err != nil || len(raw) != sha256.Size || fp != strings.ToLower(fp) {
			return Token{}, errors.New("parse join token: the CA's fingerprint is not a SHA-256 in lower-case hexadecimal digits: it was cut off or changed")
		}
	}
	return t, nil
}

func checkToken(id, secret string) error {
	if len(id) != tokenID || strings.Trim(id, "abcdefghijklmnopqrstuvwxyz234567") != "" {
		return errors.New("the id is malformed")
	}
	// Decoding alone would accept texts that differ in unused bits.
	raw, err := tokenEncoding.DecodeString(secret)
	if err != nil || len(raw) != tokenSecret || tokenEncoding.EncodeToString(raw) != secret {
		return errors.New("the secret is malformed: it was cut off or changed")
	}
	return nil
}

// Text returns the token with its secret.
func (t Token) Text() string {
	return strings.Join(append([]string{tokenPrefix, t.ID, t.Secret}, t.CAs...), ".")
}

// String is safe to log.
func (t Token) String() string { return tokenPrefix + "." + t.ID + ".(secret)" }

// GoString is safe to log.
func (t Token) GoString() string { return t.String() }

// Pinned returns those of the CAs that the token names.
func (t Token) Pinned(cas []*x509.Certificate) []*x509.Certificate {
	return slices.DeleteFunc(slices.Clone(cas), func(c *x509.Certificate) bool {
		return !slices.Contains(t.CAs, Fingerprint(c))
	})
}

// VerifyToken reports why a token does not admit a machine: nil when it does. obj is
// what the cluster knows by the token's id, nil if nothing; the effort is the same.
// An error other than ErrToken itself says that the secret was right.
func VerifyToken(obj *api.JoinToken, secret, role, node string, now time.Time) error {
	want := strings.Repeat("0", sha256.Size*2) // the hash of nothing known
	if obj != nil && len(obj.Spec.Hash) == len(want) {
		want = obj.Spec.Hash
	}
	same := subtle.ConstantTimeCompare([]byte(hashSecret(secret)), []byte(want)) == 1
	switch {
	case obj == nil || !same:
		return ErrToken
	case !now.Before(obj.Spec.Expires.Time):
		return ErrTokenExpired
	case obj.Spec.Role != role:
		return ErrTokenRole
	case obj.Spec.Node != "" && obj.Spec.Node != node:
		return ErrTokenNode
	}
	return nil
}
