import (
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"strings"
	"sync"
)

var qcnLock sync.Mutex
var qcnCount int

type qcnCall struct {
	Args   [][]string `json:"args"`
	After  [][]string `json:"after"`
	Raised string     `json:"raised"`
	Result []string   `json:"result"`
	Values string     `json:"values"`
	Types  []string   `json:"types"`
	good   bool
	names  []string
	given  []interface{}
}

func (call *qcnCall) note() [][]string {
	found := [][]string{}
	for i, value := range call.given {
		text, good := qcnText(value)
		call.good = call.good && good && len(text) <= LONGEST
		found = append(found, []string{call.names[i], text})
	}
	return found
}

func qcnStart(receiver interface{}, names []string, given ...interface{}) *qcnCall {
	call := &qcnCall{good: true, names: names, given: given, Result: []string{}, Types: []string{}}
	call.Args = call.note()
	if receiver != nil {
		call.Args = append([][]string{{"self", strings.TrimPrefix(fmt.Sprintf("%+v", receiver), "&")}}, call.Args...)
	}
	for _, value := range given {
		call.Types = append(call.Types, fmt.Sprintf("%T", value))
	}
	values, err := json.Marshal(given)
	if err == nil && given != nil {
		call.Values = string(values)
	}
	return call
}

func (call *qcnCall) end(results ...interface{}) {
	texts := []string{}
	for _, value := range results {
		text, good := qcnText(value)
		call.good = call.good && good && len(text) <= LONGEST
		texts = append(texts, text)
	}
	call.Result = []string{strings.Join(texts, ", ")}
	call.write()
}

func (call *qcnCall) write() {
	call.After = call.note()
	qcnLock.Lock()
	defer qcnLock.Unlock()
	if !call.good || qcnCount >= MOST {
		return
	}
	qcnCount++
	line, _ := json.Marshal(call)
	if file, err := os.OpenFile("CALLS", os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0666); err == nil {
		file.Write(append(line, '\n'))
		file.Close()
	}
}

func (call *qcnCall) watch() {
	if reason := recover(); reason != nil {
		call.Raised = fmt.Sprintf("panic: %v", reason)
		call.write()
		panic(reason)
	}
}
