package seal

import (
	"encoding/binary"
	"errors"
	"math"
	"time"

	"github.com/hashicorp/raft"
)

// sealedEntry is what an entry's box holds.
type sealedEntry struct {
	// before is the term of the entry before this one, 0 if that is not known. An old
	// page that came back can hold entries that were true once; their neighbours tell.
	before           uint64
	appendedAt       time.Time
	extensions, data []byte
	key              KeyID
}

const (
	entryOverhead = 8 + 8 + binary.MaxVarintLen64
	noTime        = math.MinInt64
)

// appendName appends what a box is bound to: the place of the entry.
func appendName(b []byte, log *raft.Log) []byte {
	b = append(b, "entry"...)
	b = binary.BigEndian.AppendUint64(b, log.Index)
	b = binary.BigEndian.AppendUint64(b, log.Term)
	return append(b, byte(log.Type))
}

func appendEntry(b []byte, log *raft.Log, before uint64) []byte {
	at := int64(noTime)
	if !log.AppendedAt.IsZero() {
		at = log.AppendedAt.UnixNano()
	}
	b = binary.BigEndian.AppendUint64(b, before)
	b = binary.BigEndian.AppendUint64(b, uint64(at))
	b = append(binary.AppendUvarint(b, uint64(len(log.Extensions))), log.Extensions...)
	return append(b, log.Data...)
}

func parseEntry(b []byte) (e sealedEntry, err error) {
	if len(b) < 17 {
		return e, errors.New("its content is too short")
	}
	e.before = binary.BigEndian.Uint64(b)
	if at := int64(binary.BigEndian.Uint64(b[8:])); at != noTime {
		e.appendedAt = time.Unix(0, at)
	}
	n, size := binary.Uvarint(b[16:])
	if size <= 0 || n > uint64(len(b)-16-size) {
		return e, errors.New("its content cannot be read")
	}
	b = b[16+size:]
	e.extensions, e.data = b[:n:n], b[n:]
	if n == 0 {
		e.extensions = nil
	}
	return e, nil
}

func isBox(b []byte) bool { return len(b) > 0 && b[0] == boxMagic }
