package pki

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"decree.dev/decree/schemas/api"
)

func newToken(t testing.TB, spec api.JoinTokenSpec, ttl time.Duration) (Token, *api.JoinToken) {
	t.Helper()
	text, obj, err := NewToken([]string{strings.Repeat("a1", 32)}, spec, ttl, start)
	if err != nil {
		t.Fatal(err)
	}
	token, err := ParseToken(text)
	if err != nil {
		t.Fatal(err)
	}
	return token, obj
}

func TestVerifyToken(t *testing.T) {
	agent, agentObj := newToken(t, api.JoinTokenSpec{Role: api.RoleAgent, By: "ann"}, time.Hour)
	other, _ := newToken(t, api.JoinTokenSpec{Role: api.RoleAgent}, time.Hour)
	bound, boundObj := newToken(t, api.JoinTokenSpec{Role: api.RoleServer, Node: "s1"}, time.Hour)
	for _, tt := range []struct {
		name   string
		obj    *api.JoinToken
		secret string
		role   string
		node   string
		after  time.Duration
		want   error
	}{
		{"right", agentObj, agent.Secret, api.RoleAgent, "n1", 0, nil},
		{"at the last moment", agentObj, agent.Secret, api.RoleAgent, "n1", time.Hour - 1, nil},
		{"expired", agentObj, agent.Secret, api.RoleAgent, "n1", time.Hour, ErrTokenExpired},
		{"of an agent for a server", agentObj, agent.Secret, api.RoleServer, "n1", 0, ErrTokenRole},
		{"of a server for an agent", boundObj, bound.Secret, api.RoleAgent, "s1", 0, ErrTokenRole},
		{"for the machine", boundObj, bound.Secret, api.RoleServer, "s1", 0, nil},
		{"for another machine", boundObj, bound.Secret, api.RoleServer, "s2", 0, ErrTokenNode},
		{"another secret", agentObj, other.Secret, api.RoleAgent, "n1", 0, ErrToken},
		{"another secret, expired", agentObj, other.Secret, api.RoleServer, "n1", time.Hour, ErrToken},
		{"no secret", agentObj, "", api.RoleAgent, "n1", 0, ErrToken},
		{"the hash for the secret", agentObj, agentObj.Spec.Hash, api.RoleAgent, "n1", 0, ErrToken},
		{"an unknown id", nil, agent.Secret, api.RoleAgent, "n1", 0, ErrToken},
		{"a damaged object", &api.JoinToken{}, agent.Secret, api.RoleAgent, "n1", 0, ErrToken},
	} {
		if err := VerifyToken(tt.obj, tt.secret, tt.role, tt.node, start.Add(tt.after)); err != tt.want {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
	for _, err := range []error{ErrTokenExpired, ErrTokenRole, ErrTokenNode} {
		if !errors.Is(err, ErrToken) {
			t.Errorf("%v is no ErrToken", err)
		}
	}
}

func TestNewToken(t *testing.T) {
	token, obj := newToken(t, api.JoinTokenSpec{Role: api.RoleAgent, By: "ann"}, time.Hour)
	if obj.Name != token.ID || obj.Spec.By != "ann" || !obj.Spec.Expires.Time.Equal(start.Add(time.Hour)) {
		t.Errorf("%+v", obj)
	}
	if strings.Contains(fmt.Sprintf("%+v", obj), token.Secret) {
		t.Error("the object has the secret")
	}
	for _, text := range []string{token.String(), fmt.Sprintf("%v %+v %#v %s", token, token, token, token)} {
		if strings.Contains(text, token.Secret) {
			t.Errorf("a log would have the secret: %s", text)
		}
	}
	cas := []string{strings.Repeat("a1", 32)}
	for name, make := range map[string]func() (string, *api.JoinToken, error){
		"no role": func() (string, *api.JoinToken, error) { return NewToken(cas, api.JoinTokenSpec{}, time.Hour, start) },
		"admin": func() (string, *api.JoinToken, error) {
			return NewToken(cas, api.JoinTokenSpec{Role: "admin"}, time.Hour, start)
		},
		"no time": func() (string, *api.JoinToken, error) {
			return NewToken(cas, api.JoinTokenSpec{Role: api.RoleAgent}, 0, start)
		},
		"no CA": func() (string, *api.JoinToken, error) {
			return NewToken(nil, api.JoinTokenSpec{Role: api.RoleAgent}, time.Hour, start)
		},
		"not a CA": func() (string, *api.JoinToken, error) {
			return NewToken([]string{"x"}, api.JoinTokenSpec{Role: api.RoleAgent}, time.Hour, start)
		},
		"bad names": func() (string, *api.JoinToken, error) {
			return NewToken(cas, api.JoinTokenSpec{Role: api.RoleAgent, Node: "A b"}, time.Hour, start)
		},
	} {
		if text, _, err := make(); err == nil {
			t.Errorf("%s: %s", name, text)
		}
	}
}

func TestParseToken(t *testing.T) {
	token, _ := newToken(t, api.JoinTokenSpec{Role: api.RoleAgent}, time.Hour)
	text, ca := token.Text(), token.CAs[0]
	if got, err := ParseToken(" " + text + "\n"); err != nil || got.Text() != text {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := ParseToken(text + "." + strings.Repeat("0", 64)); err != nil || len(got.CAs) != 2 {
		t.Errorf("two CAs: %v, %v", got, err)
	}
	for _, tt := range []struct{ text, want string }{
		{"", "does not start"},
		{"K10abc::server:secret", "does not start"},
		{"decree2" + text[7:], "does not start"},
		{"decree1." + token.ID, "cut off"},
		{strings.TrimSuffix(text, "."+ca), "cut off"},
		{text[:len(text)-1], "fingerprint"},
		{text[:len(text)-1] + "G", "fingerprint"},
		{strings.ToUpper(text), "does not start"},
		{strings.Replace(text, ca, strings.ToUpper(ca), 1), "fingerprint"},
		{strings.Replace(text, token.Secret, token.Secret[1:], 1), "secret is malformed"},
		{strings.Replace(text, token.Secret, token.Secret[:51]+"1", 1), "secret is malformed"},
		{strings.Replace(text, token.ID, token.ID+"x", 1), "id is malformed"},
		{strings.Replace(text, token.ID, "../../../x", 1), ""},
		{text + strings.Repeat("."+ca, 4), "more than 4"},
		{strings.Repeat("x", 10000), "too many"},
	} {
		_, err := ParseToken(tt.text)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%.60q: %v, want %q", tt.text, err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), token.Secret[2:50]) {
			t.Errorf("the error shows the secret: %v", err)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	token, _ := newToken(f, api.JoinTokenSpec{Role: api.RoleAgent}, time.Hour)
	f.Add(token.Text())
	f.Add("decree1....")
	f.Fuzz(func(t *testing.T, text string) {
		got, err := ParseToken(text)
		if err != nil {
			return
		}
		if got.Text() != strings.TrimSpace(text) {
			t.Fatalf("%q was read as %q", text, got.Text())
		}
	})
}
