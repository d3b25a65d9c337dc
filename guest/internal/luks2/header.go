package luks2

import (
	"fmt"
	"io"
	"os"
)

// Header is a volume's header in guest memory. It holds the key of the data, encrypted with the volume's key. It is for one goroutine at
// a time.
type Header struct {
	file     *os.File
	metadata Metadata
	bytes    uint64 // length of the mappings; 0 until they were open
}

// newHeader checks what is in a file.
func newHeader(file *os.File) (*Header, error) {
	m, err := readMetadata(file)
	if err != nil {
		return nil, err
	}
	return &Header{file: file, metadata: m}, nil
}

func readMetadata(file *os.File) (Metadata, error) {
	info, err := file.Stat()
	if err != nil {
		return Metadata{}, fmt.Errorf("LUKS2 header: %w", err)
	}
	switch {
	case info.Size() < headerBytes:
		return Metadata{}, fmt.Errorf("%d bytes, not %d: %w", info.Size(), headerBytes, ErrTruncated)
	case info.Size() > headerBytes:
		return Metadata{}, fmt.Errorf("%d bytes, not %d: %w", info.Size(), headerBytes, ErrOversize)
	}
	raw, err := io.ReadAll(io.NewSectionReader(file, 0, metadataBytes))
	if err != nil {
		return Metadata{}, fmt.Errorf("LUKS2 header: %w", err)
	}
	return Parse(raw)
}

// check makes sure that the header is still the one that was made.
func (h *Header) check() error {
	m, err := readMetadata(h.file)
	if err != nil {
		return err
	}
	if m != h.metadata {
		return ErrForeign
	}
	return nil
}

// Metadata is what the header says.
func (h *Header) Metadata() Metadata { return h.metadata }

// Close overwrites the header and frees its memory. Without it nobody reads the volume again, whatever key he has.
func (h *Header) Close() error {
	_, err := h.file.WriteAt(make([]byte, headerBytes), 0)
	if closeErr := h.file.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("overwrite LUKS2 header: %w", err)
	}
	return nil
}
