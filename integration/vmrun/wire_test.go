package main

import (
	"bytes"
	"io"
	"testing"
)

func TestFrames(t *testing.T) {
	t.Parallel()
	var wire bytes.Buffer
	for _, payload := range []string{"", "hello", string(make([]byte, maxPayload))} {
		if err := writeFrame(&wire, kindStderr, []byte(payload)); err != nil {
			t.Fatal(err)
		}
		kind, got, err := readFrame(&wire)
		if err != nil || kind != kindStderr || string(got) != payload {
			t.Errorf("%d bytes came back as kind %d, %d bytes, %v", len(payload), kind, len(got), err)
		}
	}
	if _, _, err := readFrame(&wire); err != io.EOF {
		t.Errorf("after the last frame: %v, want EOF", err)
	}
	if _, _, err := readFrame(bytes.NewReader([]byte{1, 0, 1, 0, 1})); err == nil || err == io.EOF {
		t.Errorf("a frame beyond the limit: %v", err)
	}
	if _, _, err := readFrame(bytes.NewReader([]byte{1, 0, 0, 0, 1})); err != io.EOF {
		t.Errorf("a frame without its payload: %v", err)
	}
}

func TestConversationEndsWithTheExitStatus(t *testing.T) {
	t.Parallel()
	type frame struct {
		kind    kind
		payload string
	}
	for name, test := range map[string]struct {
		frames []frame
		status int
		err    string
	}{
		"exit":             {[]frame{{kindStdout, "out"}, {kindStderr, "err"}, {kindExit, "\x07"}}, 7, ""},
		"cannot start":     {[]frame{{kindError, "no such program"}}, 0, "no such program"},
		"machine ends":     {[]frame{{kindStdout, "out"}}, 0, "the machine ended before the command: EOF"},
		"unknown frame":    {[]frame{{99, ""}}, 0, "frame of kind 99 with 0 bytes"},
		"exit of no size":  {[]frame{{kindExit, ""}}, 0, "frame of kind 3 with 0 bytes"},
		"nothing is after": {[]frame{{kindExit, "\x01"}, {kindStdout, "late"}}, 1, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var wire bytes.Buffer
			for _, frame := range test.frames {
				if err := writeFrame(&wire, frame.kind, []byte(frame.payload)); err != nil {
					t.Fatal(err)
				}
			}
			port := struct {
				io.Reader
				io.Writer
			}{&wire, io.Discard}
			var stdout, stderr bytes.Buffer
			status, err := converse(port, request{}, &stdout, &stderr)
			if status != test.status || (err == nil) != (test.err == "") || err != nil && err.Error() != test.err {
				t.Errorf("status %d, error %v, want %d, %q", status, err, test.status, test.err)
			}
			if stdout.String() == "late" {
				t.Error("output after the end")
			}
		})
	}
}

func TestParseSize(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int64{
		"512": 512, "4K": 4 << 10, "64M": 64 << 20, "2G": 2 << 30,
		"": 0, "M": 0, "0": 0, "-1M": 0, "1.5G": 0, "1T": 0, "64MB": 0, "99999999999G": 0,
	} {
		got, err := parseSize(text)
		if got != want || (err == nil) != (want > 0) {
			t.Errorf("parseSize(%q) = %d, %v, want %d", text, got, err, want)
		}
	}
}
