package bundle

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// A member of a JSON object, with key and value as they were written.
type member struct {
	name       string
	key, value json.RawMessage
}

// parseObject splits a JSON object into its members, in their order.
func parseObject(data json.RawMessage) ([]member, error) {
	decoder := json.NewDecoder(bytes.NewReader(data))
	if start, err := decoder.Token(); err != nil {
		return nil, err
	} else if start != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	var members []member
	for decoder.More() {
		before := decoder.InputOffset()
		name, err := decoder.Token()
		if err != nil {
			return nil, err
		}
		m := member{
			name: name.(string), // The decoder takes nothing else here.
			key:  bytes.TrimLeft(data[before:decoder.InputOffset()], ", \t\r\n"),
		}
		if err := decoder.Decode(&m.value); err != nil {
			return nil, err
		}
		members = append(members, m)
	}
	if _, err := decoder.Token(); err != nil {
		return nil, err
	}
	if rest := bytes.TrimSpace(data[decoder.InputOffset():]); len(rest) > 0 {
		return nil, errors.New("data after the JSON object")
	}
	return members, nil
}

func encodeObject(members []member) json.RawMessage {
	out := []byte{'{'}
	for i, m := range members {
		if i > 0 {
			out = append(out, ',')
		}
		out = append(append(append(out, m.key...), ':'), m.value...)
	}
	return append(out, '}')
}

// edit changes the value of one member of an object; all others keep their
// bytes. A change that gives nil takes the member out. An object without that
// member, or null in its place, stays as it is. A name that is there twice, or
// in another case, is an error: encoding/json, which the runtime reads the
// file with, would match that too.
func edit(data json.RawMessage, name string, change func(json.RawMessage) (json.RawMessage, error)) (json.RawMessage, error) {
	if string(data) == "null" {
		return data, nil
	}
	members, err := parseObject(data)
	if err != nil {
		return nil, err
	}
	found := -1
	for i, m := range members {
		if !strings.EqualFold(m.name, name) {
			continue
		}
		if found >= 0 || m.name != name {
			return nil, fmt.Errorf("ambiguous key %q", m.name)
		}
		found = i
	}
	if found < 0 {
		return data, nil
	}
	value, err := change(members[found].value)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if value == nil {
		members = append(members[:found], members[found+1:]...)
	} else {
		members[found].value = value
	}
	return encodeObject(members), nil
}

// remove is the change that takes a member out.
func remove(json.RawMessage) (json.RawMessage, error) { return nil, nil }

// filter is the change that takes the elements of an array out for which drop says so.
func filter(drop func(json.RawMessage) (bool, error)) func(json.RawMessage) (json.RawMessage, error) {
	return func(data json.RawMessage) (json.RawMessage, error) {
		var all []json.RawMessage
		if err := json.Unmarshal(data, &all); err != nil {
			return nil, err
		}
		kept := [][]byte{}
		for _, element := range all {
			dropped, err := drop(element)
			if err != nil {
				return nil, err
			}
			if !dropped {
				kept = append(kept, element)
			}
		}
		if len(kept) == len(all) {
			return data, nil
		}
		return append(append([]byte{'['}, bytes.Join(kept, []byte{','})...), ']'), nil
	}
}
