package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
)

// A box is one sealed value:
//
//	magic    1 byte, 0xc1
//	version  1 byte
//	key      8 bytes: id of the data key
//	salt    16 bytes: which subkey of it
//	counter  8 bytes: with the last 4 of the salt the nonce
//	ciphertext and tag
//
// 0xc1 is the byte that MessagePack never uses and no format of command has, so that
// a box is never the beginning of an entry that was stored in the clear.
//
// AES-GCM must never meet the same nonce twice under one key, and random nonces of 96
// bits allow only 2^32 messages per key (NIST SP 800-38D, 8.3): a busy server would
// reach that within weeks. So each process draws a salt, derives a subkey of its own
// from the data key (HKDF-SHA256, RFC 5869), and counts: no state to persist, no
// nonce repeated after a crash, and a restored copy of the folder draws another salt.
// A subkey retires after maxMessages or maxBytes, long before its bounds.
const (
	boxMagic   = 0xc1
	boxVersion = 1
	boxHeader  = 1 + 1 + keyIDSize + saltSize + 8
	boxTag     = 16

	keyIDSize   = 8
	keySize     = 32
	saltSize    = 16
	nonceSize   = 12
	maxMessages = 1 << 32
	maxBytes    = 1 << 38 // 256 GiB
)

var errTag = errors.New("its authentication tag does not fit")

// subkeyName says which subkey a box uses, as its header does.
type subkeyName [keyIDSize + saltSize]byte

// writer is the subkey that this process seals with.
type writer struct {
	name     subkeyName
	aead     cipher.AEAD
	messages uint64
	bytes    uint64
}

func newAEAD(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("use key: %w", err)
	}
	return cipher.NewGCM(block)
}

func derive(key, salt []byte, purpose string, n int) ([]byte, error) {
	b, err := hkdf.Key(sha256.New, key, salt, "decree seal v1 "+purpose, n)
	if err != nil {
		return nil, fmt.Errorf("derive key: %w", err)
	}
	return b, nil
}

func newWriter(k *dataKey) (*writer, error) {
	w := &writer{}
	copy(w.name[:], k.id[:])
	salt := w.name[keyIDSize:]
	rand.Read(salt) // never fails
	var err error
	w.aead, err = subkey(k, salt)
	return w, err
}

func subkey(k *dataKey, salt []byte) (cipher.AEAD, error) {
	b, err := derive(k.key, salt, "box", keySize)
	if err != nil {
		return nil, err
	}
	return newAEAD(b)
}

// newBox returns an empty box with room for n bytes, to which the content is appended.
func newBox(n int) []byte { return make([]byte, boxHeader, boxHeader+n+boxTag) }

// seal turns what follows the first boxHeader bytes of box into a box, in place if it
// has the capacity for the tag. What names where the box belongs: it can be opened
// only with the same what.
func (k *Keyring) seal(box, what []byte) ([]byte, error) {
	plain := box[boxHeader:]
	w, n, err := k.next(len(plain))
	if err != nil {
		return nil, err
	}
	box[0], box[1] = boxMagic, boxVersion
	copy(box[2:], w.name[:])
	binary.BigEndian.PutUint64(box[boxHeader-8:], n)
	return w.aead.Seal(box[:boxHeader], boxNonce(box), plain, what), nil
}

// next returns the subkey and the number of the next message under it.
func (k *Keyring) next(size int) (*writer, uint64, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if w := k.writer; w == nil || w.messages >= maxMessages || w.bytes >= maxBytes {
		fresh, err := newWriter(k.current())
		if err != nil {
			return nil, 0, err
		}
		k.writer = fresh
	}
	k.writer.messages++
	k.writer.bytes += uint64(size)
	return k.writer, k.writer.messages - 1, nil
}

// boxNonce is the nonce of a box, in its own memory.
func boxNonce(box []byte) []byte { return box[boxHeader-nonceSize : boxHeader] }

// open returns what is in a box, in dst, which may be the memory of the ciphertext. The
// error says why it cannot be opened; the caller says where that was.
func (k *Keyring) open(dst, box, what []byte) ([]byte, error) {
	name, err := boxKey(box)
	if err != nil {
		return nil, err
	}
	aead, known, err := k.reader(name)
	if err != nil {
		return nil, err
	}
	plain, err := aead.Open(dst, boxNonce(box), box[boxHeader:], what)
	if err != nil {
		return nil, errTag
	}
	if !known { // a salt that opens something is a real one, not a flipped bit
		k.mu.Lock()
		k.readers[name] = aead
		k.mu.Unlock()
	}
	return plain, nil
}

func boxKey(box []byte) (name subkeyName, err error) {
	if len(box) < boxHeader+boxTag || box[0] != boxMagic {
		return name, errors.New("it is not sealed")
	}
	if box[1] != boxVersion {
		return name, fmt.Errorf("it is sealed in version %d, this version of decree reads version %d", box[1], boxVersion)
	}
	copy(name[:], box[2:])
	return name, nil
}

func (k *Keyring) reader(name subkeyName) (_ cipher.AEAD, known bool, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if aead, ok := k.readers[name]; ok {
		return aead, true, nil
	}
	key := k.find(KeyID(name[:keyIDSize]))
	if key == nil {
		return nil, false, fmt.Errorf("its key %x is not in the keyring", name[:keyIDSize])
	}
	aead, err := subkey(key, name[keyIDSize:])
	return aead, false, err
}
